"""The fit, which finds the most accurate model within a budget on the device where the model will run."""
