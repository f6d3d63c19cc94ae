"""The parts of the simulated shop: its world, its users, their lives, and the events they leave."""
