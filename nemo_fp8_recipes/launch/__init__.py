"""Starting a job where `launcher=` says: on this machine, with torchrun on one or several nodes, or as a
batch job of SLURM.

    arguments   what was typed: options, overrides, a script of the user's own
    plan        the job that it means: id, run directory, processes, variables
    claim       the right to use the run directory
    node        the processes of one node, watched until they end
    worker      what runs in each process before the job does
    slurm/      batch script, submission, what SLURM says about a job
    runs/       run directories and the state they are in

Nothing here imports torch: that is left to the job.
"""
