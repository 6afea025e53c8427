"""What each operation means: its signature, checks, documentation and registration with PyTorch. No arithmetic."""
