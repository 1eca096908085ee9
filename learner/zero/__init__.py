"""What ``learner.engine_deepspeed`` is made of: one part of an algorithm under ZeRO."""
