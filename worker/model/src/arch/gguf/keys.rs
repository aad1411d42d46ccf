//! Metadata keys under the architecture's own prefix, and what the tensor directory tells.

use std::collections::BTreeMap;

use crate::arch::families::row::{Flag, Number};
use crate::arch::families::{Family, Names};
use crate::checkpoint::TensorEntry;
use crate::error::Result;
use crate::gguf::Metadata;

/// A GGUF file that is being read.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub metadata: &'a Metadata,
    /// `general.architecture`, which keys begin with.
    pub name: &'a str,
    pub tensors: &'a BTreeMap<String, TensorEntry>,
    pub family: &'a Family,
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
}

impl Keys<'_> {
    pub fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        self.metadata.size(&self.key(key))
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.metadata.optional_u32(&self.key(key))?.map(|size| size as usize))
    }

    pub fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        self.metadata.optional_float(&self.key(key))
    }

    /// Writers put 0 where a model has no such factor.
    pub fn not_zero(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.optional_float(key)?.filter(|value| *value != 0.0))
    }

    /// A number of the file, else that of the family's row.
    pub fn number_or(&self, key: &str, row: Option<&Number>) -> Result<Option<f32>> {
        let value = match self.optional_float(key)? {
            Some(value) => Some(value).filter(|value| *value != 0.0),
            None => row.and_then(|row| row.absent),
        };
        Ok(value.map(|value| value as f32))
    }

    /// The first of some names of layer 0 for which there is a tensor.
    pub fn layer_name(&self, names: Names, ending: &str) -> Option<String> {
        let prefix = self.family.gguf.names.layer.replace("{}", "0");
        names.iter().map(|name| format!("{prefix}{name}.{ending}")).find(|name| self.tensors.contains_key(name))
    }

    /// As config.json would have it: the tensors of layer 0 tell.
    pub fn flag(&self, flag: Flag, names: Names, ending: &str) -> bool {
        match flag {
            Flag::Always => true,
            Flag::Never => false,
            Flag::Key(..) => self.layer_name(names, ending).is_some(),
        }
    }
}
