"""What every part uses: files, the hub, hashing, accelerators, timing."""
