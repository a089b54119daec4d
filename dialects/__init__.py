"""What a serving graph can say: one dialect a file."""
