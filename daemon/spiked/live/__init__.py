"""The live path: clean, detect, sort as one object, and the process around it."""
