"""What goes wrong around a ledger: what happens then, and the test that says so.

- SIGKILL in capture, sealing, resume, a pass, retraining: no acknowledged row lost, corrupt or doubled.
  (``kill_trials``)
- half files, stages that died being opened: invisible; gone when somebody goes on. (``test_leftovers``)
- full disk (a real one), read-only directory: ``LedgerNotWritableError``, stage incomplete with the reason.
  (``test_disk``)
- permission lost, quota, broken disk: the same, at any step. (``test_disk``)
- a fault anywhere in capture: training goes on, one warning, no hook left. (``capture/test_faults``)
- clock set back or ahead: order and identity of stages stay. (``test_clock``)
- NaN, infinite, exploding losses and gradients: recorded, one warning, left out of answers with a caveat.
  (``test_numbers``)
- ids given twice: a row each time, described once. (``test_numbers``)
- two processes on one stage or pass: ``StageExistsError`` "Another process is writing". (``test_two_writers``)
- a stage name that is taken: ``StageExistsError`` "is already recorded". (``ledger/test_damage``)
- another model: ``ModelMismatchError``. (``ledger/test_damage``)
- weights changed between stages: no parent, with the reason. (``ledger/test_links``)
- resumed with other settings: ``ModelMismatchError`` "other layers or sketch settings". (``ledger/test_resume``)
- truncated, missing files: ``CorruptPartError`` "were sealed", ``verify``. (``ledger/test_damage``)
- flipped bits: ``CorruptPartError`` "another checksum" of tables; ``verify`` of all. (``ledger/test_damage``)
- a newer format: ``LedgerFormatError`` "has format 99". (``ledger/test_damage``)
- names and links that lead out of the ledger: ``LedgerFormatError``. (``ledger/test_untrusted``,
  ``test_hostile_ledgers``)
- any other value or byte anywhere: an error of this library, or an answer. (``test_hostile_ledgers``,
  ``fuzz_reader``)
- reading while a stage is recorded, several analyzers: sealed parts only, equal answers, a pass made once.
  (``test_several_processes``)
"""
