"""The forms of an anchor: when each acts in a step, and on what."""
