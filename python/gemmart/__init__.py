"""Run Gemma on your own machine."""
