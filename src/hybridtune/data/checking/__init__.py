"""What is wrong with labelled rows, and what is done about it: `check` has a function for every task."""
