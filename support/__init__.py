"""What makes the project work for real, and knows nothing of the paper: files, images, metrics, the run."""
