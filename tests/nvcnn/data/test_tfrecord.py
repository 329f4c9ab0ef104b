"""Our records against other readers (protobuf, TensorBoard's), and every way a file can be damaged."""

import contextlib
import struct
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcnn.data import tfrecord
from nvcnn.data.records import Records
from nvcnn.data.shard_source import index_path
from nvcnn.program import InputError
from tests.samples import write_shard

pytest.importorskip("google.protobuf")  # comes with TensorBoard

values = st.one_of(
    st.lists(st.binary(max_size=300), max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)
features = st.dictionaries(st.text(max_size=20), values, max_size=5)


def protobuf_example():
    """tf.train.Example as the protobuf library has it, from the fields of tensorflow/core/example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        m = file.message_type.add(name=name)
        for number, (key, kind, repeated) in enumerate(fields, 1):
            f = m.field.add(name=key, number=number, label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL)
            f.type = field.TYPE_MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                f.type_name = f".tf.{kind}"
        return m

    for name, kind in (
        ("BytesList", field.TYPE_BYTES),
        ("FloatList", field.TYPE_FLOAT),
        ("Int64List", field.TYPE_INT64),
    ):
        message(name, ("value", kind, True))
    feature = message("Feature", *((k, f"{k.capitalize()}List", False) for k in ("bytes", "float", "int64")))
    feature.oneof_decl.add(name="kind")
    for f in feature.field:
        f.oneof_index = 0
    entry = message("Features", ("feature", "Features.Entry", True)).nested_type.add(name="Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=1, type=field.TYPE_MESSAGE, type_name=".tf.Feature")
    file.message_type[-1].field[0].type_name = ".tf.Features.Entry"
    message("Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


Example = protobuf_example()


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


def write(path, records):
    write_shard(path, iter(records))
    return path


RECORDS = [b"", b"one", bytes(range(256)) * 300]


def test_records_come_back_and_the_index_tells_where_they_are(tmp_path):
    shard = write(tmp_path / "shard", RECORDS)
    assert list(tfrecord.read_records(shard)) == RECORDS
    assert index_path(shard).read_text() == f"0 16\n16 19\n35 {256 * 300 + 16}\n"
    assert list(tfrecord.scan(shard)) == [(0, 16), (16, 19), (35, 256 * 300 + 16)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard", "shard.idx"]


def test_tensorboards_reader_takes_our_records(tmp_path):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(write(tmp_path / "shard", RECORDS)))
    for record in RECORDS:
        reader.GetNext()  # checks both CRCs
        assert reader.record() == record


@pytest.mark.parametrize("byte", [0, 9, 12, 14, 15, 18])
def test_a_flipped_bit_is_found(tmp_path, byte):
    shard = write(tmp_path / "shard", [b"one", b"two"])
    data = bytearray(shard.read_bytes())
    data[byte] ^= 4
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"shard: .*byte 0"):
        list(tfrecord.read_records(shard))


@pytest.mark.parametrize("size", [20, 34, 36, 37])
def test_a_truncated_shard_is_found(tmp_path, size):
    shard = write(tmp_path / "shard", [b"one", b"two"])
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


def build(shard):
    Records.build_index(shard)


def test_several_processes_build_one_index(tmp_path):
    shard = write(tmp_path / "shard", [bytes(i) for i in range(1000)])
    index = index_path(shard)
    expected = index.read_text()
    index.unlink()
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(build, [shard] * 8))
    assert index.read_text() == expected
    assert len(list(tmp_path.iterdir())) == 2
