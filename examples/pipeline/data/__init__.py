"""Images: scanning folders, reading files, and the sources of training views."""
