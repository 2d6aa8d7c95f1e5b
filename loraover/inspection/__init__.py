"""What a folder holds, and what this installation can do."""
