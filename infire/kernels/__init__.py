"""One op a file: reference, kernel, launcher."""
