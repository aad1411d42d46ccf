//! Element and block types of weights and of the KV cache, with their sizes in memory.
//!
//! The block layouts are GGUF's (spec E.6); a dense type is a block of one element.

use std::fmt;

/// Storage type of a weight matrix. A row is a whole number of blocks.
#[allow(non_camel_case_types, reason = "the names that files give them")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision, little endian.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 32 values: f16 scale, 16 bytes of nibbles (low nibbles are the first 16 values); value = d·(q−8).
    Q4_0,
    /// 32 values: f16 scale d, f16 minimum m, 16 bytes of nibbles; value = d·q + m.
    Q4_1,
    /// 32 values: f16 scale, 32 signed bytes; value = d·q.
    Q8_0,
    /// 32 values: f16 scale, 4 bytes of fifth bits, nibbles as Q4_0; value = d·(q−16).
    Q5_0,
    /// 32 values: f16 scale d, f16 minimum m, 4 bytes of fifth bits, nibbles; value = d·q + m.
    Q5_1,
    /// 256 values in 16 runs: a nibble of scale and one of minimum each, 2-bit values, f16 d and dmin at the end.
    Q2_K,
    /// 256 values in 16 runs: third bits, 2-bit values, 16 6-bit scales (32 subtracted), f16 d at the end.
    Q3_K,
    /// 256 values in 8 runs: f16 d and dmin, 8 6-bit scales and minima, nibbles.
    Q4_K,
    /// As Q4_K, with fifth bits before the nibbles.
    Q5_K,
    /// 256 values in 16 runs: nibbles, 2 upper bits each, 16 signed-byte scales, f16 d at the end; 32 subtracted.
    Q6_K,
    /// 32 values: f16 scale, nibbles that index a table of 16 signed bytes.
    IQ4_NL,
    /// 256 values in 8 runs: f16 d, 8 6-bit scales (32 subtracted), nibbles into IQ4_NL's table.
    IQ4_XS,
    /// 32 values: an exponent byte (E8M0), nibbles of E2M1 (OCP microscaling).
    MXFP4,
    /// 8-bit float: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, 0x7f and 0xff are NaN. Products
    /// multiply it by its [`crate::BlockScales`], where it has some.
    F8E4M3,
}

/// What a type's name, sizes and scales are: one row per type.
struct Facts {
    name: &'static str,
    block_elements: usize,
    block_bytes: usize,
    /// Where the f16 scales of a block lie.
    half_scales: &'static [usize],
}

impl DType {
    const fn facts(self) -> Facts {
        const fn row(name: &'static str, block_elements: usize, block_bytes: usize, half_scales: &'static [usize]) -> Facts {
            Facts { name, block_elements, block_bytes, half_scales }
        }
        match self {
            DType::F32 => row("F32", 1, 4, &[]),
            DType::F16 => row("F16", 1, 2, &[]),
            DType::BF16 => row("BF16", 1, 2, &[]),
            DType::F8E4M3 => row("F8_E4M3", 1, 1, &[]),
            DType::Q4_0 => row("Q4_0", 32, 18, &[0]),
            DType::Q4_1 => row("Q4_1", 32, 20, &[0, 2]),
            DType::Q5_0 => row("Q5_0", 32, 22, &[0]),
            DType::Q5_1 => row("Q5_1", 32, 24, &[0, 2]),
            DType::Q8_0 => row("Q8_0", 32, 34, &[0]),
            DType::Q2_K => row("Q2_K", 256, 84, &[80, 82]),
            DType::Q3_K => row("Q3_K", 256, 110, &[108]),
            DType::Q4_K => row("Q4_K", 256, 144, &[0, 2]),
            DType::Q5_K => row("Q5_K", 256, 176, &[0, 2]),
            DType::Q6_K => row("Q6_K", 256, 210, &[208]),
            DType::IQ4_NL => row("IQ4_NL", 32, 18, &[0]),
            DType::IQ4_XS => row("IQ4_XS", 256, 136, &[0]),
            DType::MXFP4 => row("MXFP4", 32, 17, &[]),
        }
    }

    /// Every type.
    pub const ALL: [DType; 17] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q8_0,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::IQ4_NL,
        DType::IQ4_XS,
        DType::MXFP4,
        DType::F8E4M3,
    ];

    /// Values per block.
    pub const fn block_elements(self) -> usize {
        self.facts().block_elements
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        self.facts().block_bytes
    }

    /// Where the f16 scales and minima of a quantized block lie.
    pub(crate) const fn half_scales(self) -> &'static [usize] {
        self.facts().half_scales
    }

    /// Bytes of a row of `columns` values; `None` where a block would be cut or the size overflows.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block_elements()) {
            return None;
        }
        (columns / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// Whether products quantize the activations (per 32 values, to signed bytes).
    pub const fn is_quantized(self) -> bool {
        self.block_elements() > 1
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.facts().name)
    }
}

/// Storage type of keys and values. They are rounded to it when written, and attention reads only what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Signed bytes, with one bfloat16 scale per token and head.
    Int8,
}

impl KvDType {
    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            KvDType::F32 => 4,
            KvDType::F16 | KvDType::BF16 => 2,
            KvDType::Int8 => 1,
        }
    }

    /// Bytes of the scale of one token and head, keys or values.
    pub const fn scale_bytes(self) -> usize {
        match self {
            KvDType::F32 | KvDType::F16 | KvDType::BF16 => 0,
            KvDType::Int8 => 2,
        }
    }
}

impl fmt::Display for KvDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDType::F32 => "f32",
            KvDType::F16 => "f16",
            KvDType::BF16 => "bf16",
            KvDType::Int8 => "int8",
        })
    }
}
