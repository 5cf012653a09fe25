"""What a training stage will take, before it starts: memory, time, and a layout that fits. Integers and floats only."""
