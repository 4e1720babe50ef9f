"""What the page is made of: HTML, CSS and JavaScript."""
