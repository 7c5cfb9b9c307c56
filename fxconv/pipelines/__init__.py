"""One thin adapter per ecosystem: each turns what that ecosystem hands over into a call of `fxconv.transform`."""
