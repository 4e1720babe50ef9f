"""The student, one step, and the loop around it."""
