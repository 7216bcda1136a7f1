"""Where images come from: what lies in a folder, what is read of it, and every source of training views."""
