import pytest

from fleet.errors import StorageError
from fleet.record import Damage, Record, crc32c, pack, parse, payload_intact, scan

SALT = b"12345678"


def make(payloads, salt=SALT):
    return b"".join(b"".join(pack(2, {"seq": i + 1}, p, salt, 64 * i)) for i, p in enumerate(payloads))


def test_the_checksum_is_crc32c_by_its_published_check_value():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(memoryview(b"6789"), crc32c(b"12345")) == 0xE3069283, "goes on from a part"
    (head, *_) = pack(2, {}, b"123456789", SALT, 0)
    assert head[5] == 2 and head[20:24] == (0xE3069283).to_bytes(4, "little")


def test_another_kind_of_checksum_is_not_guessed():
    data = bytearray(make([b"x"]))
    data[5] = 1
    assert parse(bytes(data), 0, len(data), SALT) is None


def test_records_are_aligned_and_come_back():
    payloads = [b"", b"x", b"y" * 64, b"z" * 1000]
    data = make(payloads)
    found = list(scan(data, 0, len(data), SALT))
    assert [data[r.payload_at : r.payload_at + r.payload_length] for r in found] == payloads
    assert all(r.at % 64 == 0 and r.payload_at % 64 == 0 for r in found)
    assert [(r.key["seq"], r.fsynced) for r in found] == [(1, 0), (2, 64), (3, 128), (4, 192)]


def test_every_single_bit_flip_is_seen():
    data = make([b"payload" * 9])
    (record,) = scan(data, 0, len(data), SALT)
    meaningful = 44 + record.key.__len__() + 4  # fixed header, checksum and the key; the padding behind it carries nothing
    for at in [*range(meaningful), *range(record.payload_at, record.payload_at + record.payload_length)]:
        bad = bytearray(data)
        bad[at] ^= 1 << (at % 8)
        parsed = parse(bytes(bad), 0, len(bad), SALT)
        assert parsed is None or not payload_intact(bytes(bad), parsed), at


def test_scan_goes_on_behind_damage():
    parts = [make([b"a" * 100]), make([b"b" * 500]), make([b"c" * 100])]
    data = bytearray(b"".join(parts))
    data[len(parts[0]) + 3] ^= 0xFF  # the magic of the second
    found = list(scan(bytes(data), 0, len(data), SALT))
    assert [type(item) for item in found] == [Record, Damage, Record]
    assert (found[1].at, found[1].end) == (len(parts[0]), len(parts[0]) + len(parts[1]))


def test_a_record_inside_of_a_payload_is_not_taken_for_one():
    forged = make([b"forged"], salt=b"guessed!")
    data = bytearray(make([bytes(20) + bytes(-20 % 64) + forged, b"after"]))
    data[0] ^= 0xFF
    found = list(scan(bytes(data), 0, len(data), SALT))
    assert [item.key["seq"] for item in found if isinstance(item, Record)] == [2]


def test_a_key_that_readers_would_not_take_is_not_written():
    with pytest.raises(StorageError, match="at most"):
        pack(2, {"x": b"0" * 2_000_000}, b"", SALT, 0)
