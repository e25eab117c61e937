"""What is compared with what: each module has a `section`, which measures."""
