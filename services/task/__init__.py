"""What becomes of every task: who may work on it, how often, until when."""
