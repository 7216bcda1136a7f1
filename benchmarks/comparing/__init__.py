"""What methods.py is made of: the methods, their recipe, their runs and their table."""
