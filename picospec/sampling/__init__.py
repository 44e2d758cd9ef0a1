"""What both daemons must compute alike, to the bit: distributions, noise, rejection."""
