"""What surrounds the five scripts of the exercise; README has a line for each folder."""
