"""The shipped suite against every tier we ship, and its wrappers when they let all through."""

import os
import tempfile
from pathlib import Path

import pytest

from longtape.protocols import Tier
from longtape.testing.tiers import DamagingTier, FailingTier, GatedTier, ThrottledTier, TierConformance
from longtape.tiers.codecs import parse_codec
from longtape.tiers.compressed import CompressedTier
from longtape.tiers.disk import DiskTier
from longtape.tiers.memory import MemoryTier

IN_MEMORY = Path("/dev/shm")


class TestMemoryTier(TierConformance):
    def make_tier(self, directory: Path) -> Tier:
        return MemoryTier()

    def make_limited_tier(self, directory: Path, limit: int) -> Tier:
        return MemoryTier(limit=limit)


class TestCompressed(TierConformance):
    codec = "bitshuffle+lz4"

    def make_tier(self, directory: Path) -> Tier:
        return CompressedTier(DiskTier(directory), parse_codec(self.codec))

    def make_limited_tier(self, directory: Path, limit: int) -> Tier:
        return CompressedTier(DiskTier(directory, limit=limit), parse_codec(self.codec))


class TestCompressedInMemory(TestCompressed):
    codec = "zstd"

    def make_tier(self, directory: Path) -> Tier:
        return CompressedTier(MemoryTier(), parse_codec(self.codec))

    def make_limited_tier(self, directory: Path, limit: int) -> Tier:
        return CompressedTier(MemoryTier(limit=limit), parse_codec(self.codec))


class DiskConformance(TierConformance):
    direct: bool | None = None

    def make_tier(self, directory: Path) -> Tier:
        return self.make_limited_tier(directory, None)

    def make_limited_tier(self, directory: Path, limit: int | None) -> Tier:
        tier = DiskTier(directory, limit=limit, direct=self.direct)
        if self.direct is not None:
            assert tier.direct is self.direct
        return tier

    def teardown_method(self) -> None:
        assert os.listdir(self.directory) == []
        super().teardown_method()
        assert not self.directory.exists()


def direct_works() -> bool:
    with tempfile.TemporaryDirectory() as directory:
        tier = DiskTier(directory)
        tier.close()
        return tier.direct


@pytest.mark.skipif(not direct_works(), reason="no direct I/O where temporary files are")
class TestDirect(DiskConformance):
    direct = True


class TestBuffered(DiskConformance):
    direct = False


@pytest.mark.skipif(not IN_MEMORY.is_dir(), reason="no /dev/shm")
class TestFileSystemInMemory(DiskConformance):
    def make_limited_tier(self, directory: Path, limit: int | None) -> Tier:
        tier = DiskTier(IN_MEMORY, limit=limit)
        assert not tier.direct
        assert "memory" in (tier.fallback_reason or "")
        return tier


class TestGated(TierConformance):
    def make_tier(self, directory: Path) -> Tier:
        return GatedTier(MemoryTier(), is_open=True)


class TestFailing(TierConformance):
    def make_tier(self, directory: Path) -> Tier:
        return FailingTier(MemoryTier(), lambda call: False)


class TestThrottled(TierConformance):
    def make_tier(self, directory: Path) -> Tier:
        return ThrottledTier(MemoryTier())


class TestDamaging(TierConformance):
    def make_tier(self, directory: Path) -> Tier:
        return DamagingTier(MemoryTier(), lambda call: False)
