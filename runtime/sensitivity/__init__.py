"""What each matrix costs in each format, and formats that cost least within a budget of bytes."""
