"""One optimizer step of the student, and what the step needs of the machine."""
