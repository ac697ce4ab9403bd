"""What augment.py's views are made with: resampling, and the first author's operations on grey values."""
