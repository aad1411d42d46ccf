//! Element types of torch: how they are named in a pickle, and which of them we load.

use forge_kernels::DType;

/// An element type: what torch calls it, its width, and what it is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Element {
    /// `torch.NAME`.
    pub(super) name: &'static str,
    /// `torch.STORAGE` of the classes that older versions write; empty where there was none.
    storage: &'static str,
    pub(super) bytes: usize,
    pub(super) dtype: Option<DType>,
}

const fn element(name: &'static str, storage: &'static str, bytes: usize, dtype: Option<DType>) -> Element {
    Element { name, storage, bytes, dtype }
}

const ELEMENTS: [Element; 15] = [
    element("float32", "FloatStorage", 4, Some(DType::F32)),
    element("float16", "HalfStorage", 2, Some(DType::F16)),
    element("bfloat16", "BFloat16Storage", 2, Some(DType::BF16)),
    element("float8_e4m3fn", "", 1, Some(DType::F8E4M3)),
    element("float8_e5m2", "", 1, None),
    element("float64", "DoubleStorage", 8, None),
    element("int64", "LongStorage", 8, None),
    element("int32", "IntStorage", 4, None),
    element("int16", "ShortStorage", 2, None),
    element("int8", "CharStorage", 1, None),
    element("uint8", "ByteStorage", 1, None),
    element("bool", "BoolStorage", 1, None),
    element("complex64", "ComplexFloatStorage", 8, None),
    element("complex128", "ComplexDoubleStorage", 16, None),
    element("untyped bytes", "UntypedStorage", 1, None),
];

impl Element {
    /// The type that `torch.NAME` is.
    pub(super) fn by_name(name: &str) -> Option<Element> {
        ELEMENTS.into_iter().find(|element| element.name == name)
    }

    /// The type of the elements of a storage class.
    pub(super) fn by_storage(name: &str) -> Option<Element> {
        ELEMENTS.into_iter().find(|element| !element.storage.is_empty() && element.storage == name)
    }
}
