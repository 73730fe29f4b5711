"""Lets a model that was exported for one item take several.

PyTorch writes the size of its example into the file. Where the shapes inside are computed from the input's, as they
mostly are, it is a mere declaration. Only the path to it is described here; protobuf keeps what it does not know.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# github.com/onnx/onnx, onnx.proto: message, then field, its number, and the type of it; repeated where starred.
_ONNX = {
    "Model": [("graph", 7, "Graph")],
    "Graph": [("input*", 11, "Value"), ("output*", 12, "Value"), ("value_info*", 13, "Value")],
    "Value": [("type", 2, "Type")],
    "Type": [("tensor_type", 1, "Tensor")],
    "Tensor": [("shape", 2, "Shape")],
    "Shape": [("dim*", 1, "Dimension")],
    "Dimension": [("dim_value", 1, ""), ("dim_param", 2, "text")],
}


def made_free(content: bytes) -> bytes:
    """Return a model, as ONNX has it, whose inputs and outputs have any number of items where they had one."""
    model = _model_class().FromString(content)
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if dimensions and dimensions[0].dim_value == 1:
            dimensions[0].ClearField("dim_value")
            dimensions[0].dim_param = "items"
    del model.graph.value_info[:]  # sizes that were inferred from it
    return bytes(model.SerializeToString())


def _model_class() -> Any:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="onnx_shapes.proto", package="onnx_shapes")
    for message, members in _ONNX.items():
        described = file.message_type.add(name=message)
        for name, number, kind in members:
            described.field.add(
                name=name.removesuffix("*"),
                number=number,
                label=field.LABEL_REPEATED if name.endswith("*") else field.LABEL_OPTIONAL,
                type={"": field.TYPE_INT64, "text": field.TYPE_STRING}.get(kind, field.TYPE_MESSAGE),
                type_name=f".onnx_shapes.{kind}" if kind not in ("", "text") else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("onnx_shapes.Model"))
