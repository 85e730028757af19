"""Checkpoints: Megatron's distributed format, made complete last, loaded without running what is in them.

    step_000200/
        .metadata __0_0.distcp … common.pt metadata.json    Megatron's torch_dist format
        complete.json                                       written last: a directory without it is no
        checkpoint

`directory` finds, verifies and prunes them, without torch, and so is what launching looks at too;
`checkpointer` saves and loads; `fp8_state` keeps the history and scales of delayed scaling, which Transformer
Engine itself would pickle; `safe_load` restricts what loading may do. Nothing is imported here, so that
`directory` can be without the rest."""
