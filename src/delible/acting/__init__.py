"""What agents share: tools whose calls are checked, the loop around them, tasks, learned choice."""
