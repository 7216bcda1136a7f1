"""Random views: how they are drawn, and how batches of them are rendered."""
