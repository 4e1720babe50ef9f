"""Teachers and the router that brings each row to the one its label names."""
