"""The lab: see, measure and choose a dose. Results are plain tables; each file is one experiment or tool."""
