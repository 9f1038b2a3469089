"""What a source and the keeper of a replica on another host say to each other: docs/wire.md."""
