"""Keep snapshots of the state in the shared memory of each node, for a restart of the ranks in place.

Reading order: `slot_files`, the files of one snapshot of one rank, then `placement`, which rank keeps which rows, and
where a second copy goes. `writer` takes snapshots while training continues, and `restore` finds the newest complete one
and loads it, for any number of ranks. `launches` decides which snapshots belong to the history of a run, and `keeper`
joins these parts.
"""
