//! The numbers GGUF gives to tensor storage types, and which of them this crate loads.

use forge_kernels::DType;

/// Names of all storage types by number, gaps where a number was withdrawn. A file may hold any; those without
/// kernels are refused by these names.
const NAMES: [&str; 41] = [
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2 (withdrawn)",
    "Q4_3 (withdrawn)",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4 (withdrawn)",
    "Q4_0_4_8 (withdrawn)",
    "Q4_0_8_8 (withdrawn)",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4 (withdrawn)",
    "IQ4_NL_4_8 (withdrawn)",
    "IQ4_NL_8_8 (withdrawn)",
    "MXFP4",
    "NVFP4",
];

/// The storage type with this number, or its name (or number) where it is not supported.
pub(crate) fn storage_type(number: u32) -> Result<DType, String> {
    match number {
        0 => Ok(DType::F32),
        1 => Ok(DType::F16),
        2 => Ok(DType::Q4_0),
        3 => Ok(DType::Q4_1),
        6 => Ok(DType::Q5_0),
        7 => Ok(DType::Q5_1),
        8 => Ok(DType::Q8_0),
        10 => Ok(DType::Q2_K),
        11 => Ok(DType::Q3_K),
        12 => Ok(DType::Q4_K),
        13 => Ok(DType::Q5_K),
        14 => Ok(DType::Q6_K),
        20 => Ok(DType::IQ4_NL),
        23 => Ok(DType::IQ4_XS),
        30 => Ok(DType::BF16),
        39 => Ok(DType::MXFP4),
        _ => Err(match usize::try_from(number).ok().and_then(|index| NAMES.get(index)) {
            Some(name) => (*name).to_owned(),
            None => format!("number {number} (unknown)"),
        }),
    }
}

/// The types that can be read, for an error about another.
pub(crate) fn readable() -> String {
    let names: Vec<String> =
        (0..=NAMES.len() as u32).filter_map(|number| storage_type(number).ok()).map(|dtype| dtype.to_string()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supported_types_have_their_own_names_and_others_are_named() {
        for (number, name) in NAMES.iter().enumerate() {
            match storage_type(number as u32) {
                Ok(dtype) => assert_eq!(dtype.to_string(), *name),
                Err(refused) => assert_eq!(refused, *name),
            }
        }
        assert_eq!(storage_type(15), Err("Q8_K".to_owned()));
        assert_eq!(storage_type(900), Err("number 900 (unknown)".to_owned()));
    }
}
