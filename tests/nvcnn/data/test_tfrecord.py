"""Other readers (protobuf, TensorBoard's) agree about our records, and every damage of a file is found."""

import contextlib
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcnn.data import tfrecord
from nvcnn.data.shard_source import atomic_writer, index_path
from nvcnn.program import InputError
from tests.samples import write_shard

pytest.importorskip("google.protobuf")  # comes with TensorBoard
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

values = st.one_of(
    st.lists(st.binary(max_size=300), max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)
features = st.dictionaries(st.text(max_size=20), values, max_size=5)


# The fields of tensorflow/core/example that a reader of records needs, as protobuf's text format has them.
EXAMPLE = """
name: "example.proto" package: "tf" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes" number: 1 oneof_index: 0 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tf.BytesList" }
  field { name: "float" number: 2 oneof_index: 0 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tf.FloatList" }
  field { name: "int64" number: 3 oneof_index: 0 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tf.Int64List" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".tf.Features.FeatureEntry" }
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tf.Feature" }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tf.Features" }
}
"""
pool = descriptor_pool.DescriptorPool()
pool.Add(text_format.Parse(EXAMPLE, descriptor_pb2.FileDescriptorProto()))
Example = message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


@given(features)
def test_an_example_is_what_protobuf_reads_and_writes(features):
    parsed = Example.FromString(tfrecord.encode_example(features)).features.feature
    got = {
        name: list(getattr(f, f.WhichOneof("kind")).value) if f.WhichOneof("kind") else [] for name, f in parsed.items()
    }
    assert got == features
    message = Example()
    for name, values in features.items():
        kind = {bytes: "bytes", float: "float", int: "int64"}[type(values[0])] if values else "bytes"
        getattr(message.features.feature[name], kind).value.extend(values)
    assert tfrecord.decode_example(message.SerializeToString()) == features
    assert tfrecord.decode_example(tfrecord.encode_example(features)) == features


@given(st.binary(max_size=60))
def test_decoding_garbage_raises_only_value_errors(data):
    with contextlib.suppress(ValueError):
        tfrecord.decode_example(data)


RECORDS = [b"one", b"two", b"", bytes(range(256)) * 300]


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "shard", RECORDS)
    return tmp_path / "shard"


def test_records_come_back_and_the_index_tells_where_they_are(shard):
    assert list(tfrecord.read_records(shard)) == RECORDS
    assert index_path(shard).read_text() == f"0 19\n19 19\n38 16\n54 {256 * 300 + 16}\n"
    assert list(tfrecord.scan(shard)) == [(0, 19), (19, 19), (38, 16), (54, 256 * 300 + 16)]
    assert sorted(p.name for p in shard.parent.iterdir()) == ["shard", "shard.idx"]


def test_tensorboards_reader_takes_our_records(shard):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(shard))
    for record in RECORDS:
        reader.GetNext()  # checks both CRCs
        assert reader.record() == record


@pytest.mark.parametrize("byte", [0, 9, 12, 14, 15, 18])
def test_a_flipped_bit_is_found(shard, byte):
    data = bytearray(shard.read_bytes())
    data[byte] ^= 4
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"shard: .*byte 0"):
        list(tfrecord.read_records(shard))


@pytest.mark.parametrize("size", [20, 34, 36, 37])
def test_a_truncated_shard_is_found(shard, size):
    shard.write_bytes(shard.read_bytes()[:size])
    for read in (tfrecord.read_records, tfrecord.scan):
        with pytest.raises(InputError, match=r"shard: .*byte 19.*(truncated|cut short)"):
            list(read(shard))


def test_a_length_beyond_the_file_is_found(tmp_path):
    length = struct.pack("<Q", 2**60)
    shard = tmp_path / "shard"
    shard.write_bytes(length + struct.pack("<I", tfrecord.masked_crc(length)) + b"data")
    for read in (tfrecord.read_records, tfrecord.scan):
        with pytest.raises(InputError, match="cut short"):
            list(read(shard))


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_shard(tmp_path / "shard", (b"x" * (1 // (2 - i)) for i in range(5)))
    assert not list(tmp_path.iterdir())


def test_a_file_has_its_name_only_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    """Two writers of one file do not disturb each other."""
    path, done = tmp_path / "file", []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, function=function: (done.append(name), function(*a)))
    with atomic_writer(path) as one, atomic_writer(path) as other:
        one.write(b"whole")
        other.write(b"whole")
        assert not path.exists()
    assert done == ["fsync", "replace"] * 2
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
