"""`launcher=slurm`: the batch script, its submission, and what its nodes do.

script    the batch script, readable and complete: it also works when submitted by hand
quoting   values in `#SBATCH` lines and in bash
jobs      one job, or an array of one for each combination of values (-m)
submit    sbatch, the run directories, waiting
on_node   what the script starts on each node
query     what SLURM says about a job
"""
