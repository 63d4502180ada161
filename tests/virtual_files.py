"""A file server for lease rules that lies in memory and has a clock of its own."""

from collections import Counter

from engine.lease_rules import Holder, LeaseFiles, Seen


class VirtualFiles(LeaseFiles):
    """Files as {path: inode}; ``time`` is the server's. ``before`` may hold a function called before an operation."""

    def __init__(self):
        self.time = 0.0
        self.paths, self.inodes = {}, {}
        self.operations = Counter()
        self.before = {}

    def _note(self, kind):
        self.operations[kind] += 1
        if hook := self.before.pop(kind, None):
            hook()

    def names(self, folder):
        self._note("list")
        return [path.rpartition("/")[2] for path in self.paths if path.rpartition("/")[0] == folder]

    def create(self, path, data):
        self._note("create")
        inode = self.paths.setdefault(path, len(self.inodes))
        self.inodes[inode] = [data, self.time]
        return inode

    def link(self, source, target):
        self._note("link")
        if target in self.paths or source not in self.paths:
            return False
        self.paths[target] = self.paths[source]
        return True

    def rename(self, source, target):
        self._note("rename")
        if source not in self.paths:
            return False
        self.paths[target] = self.paths.pop(source)
        return True

    def unlink(self, path):
        self._note("unlink")
        self.paths.pop(path, None)

    def renew(self, handle):
        self._note("renew")
        self.inodes[handle][1] = self.time
        return handle in self.paths.values()

    def leads_to(self, path, handle):
        self._note("stat")
        return self.paths.get(path) == handle

    def close(self, handle):
        pass

    def look(self, path):
        self._note("stat")
        inode = self.paths.get(path)
        return None if inode is None else Seen(inode, self.inodes[inode][1])

    def read(self, path):
        self._note("open")
        return self.inodes[self.paths[path]][0] if path in self.paths else b""

    def now(self, folder):
        self._note("now")
        return self.time


def holder(number):
    """Return worker ``number`` of a simulation."""
    return Holder(f"host{number}", "", "", number, 0, f"worker{number}", number)
