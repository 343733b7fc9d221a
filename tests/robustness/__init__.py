"""What goes wrong: kills, cut files, faults and hostile input."""
