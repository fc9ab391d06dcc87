"""What each command of ``trainer-attrib`` takes and prints; a module imports what it needs when its command runs."""
