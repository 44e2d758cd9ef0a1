"""What PicoSpec costs beside the models' own forwards."""
