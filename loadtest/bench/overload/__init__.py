"""What overload costs those who are let in, and those who are not."""
