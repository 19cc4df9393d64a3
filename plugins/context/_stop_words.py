"""Words of a task that say nothing of what it is about, and what is said where no other occurs, for the plugins of
cco_sidecar.
"""

STOP_WORDS = frozenset(
    """a about add adds added after all allow also an and any are as at avoid be because been before but by can change
    changes could do does don for from get had has have how if improve in instead into is it its just like made make
    makes may more need new no not now of off on only or other out over remove removed removes rename s should so some
    support t than that the their them then there these they this to too up update updated updates use used uses using
    via was we were what when where which while who why will with without would you fix fixed fixes fixing bug issue
    problem implement implements""".split()
)
WORK_WORDS = frozenset(  # in a title: of what is to be done, which say little where it has others
    """clarify describe describes doc docs documentation documented documenting explain explained explains refactor
    refactored refactoring refactors""".split()
)
NO_MATCH = "no word of the task occurs"  # the first reason of each file then
