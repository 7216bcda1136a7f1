"""Random views: how they are drawn, and what is made of them in batches."""
