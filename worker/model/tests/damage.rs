//! Damaged checkpoints of every row: one tensor of each kind (names alike but for layer and expert numbers) is dropped,
//! renamed, reshaped; each time the typed error names it.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::fixture;
use forge_model::{LoadMode, Model, ModelError};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn check_damage(name: &str) {
    let bytes = std::fs::read(fixture(&format!("rows/{name}/model.safetensors"))).unwrap();
    let tensors: BTreeMap<String, TensorView<'_>> = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().collect();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture(&format!("rows/{name}/config.json")), folder.path().join("config.json")).unwrap();
    assert!(open_with(folder.path(), &tensors).is_ok(), "{name}: the undamaged checkpoint opens");
    let mut seen = BTreeSet::new();
    for (tensor, view) in tensors.iter().rev() {
        if !seen.insert(tensor.replace(|letter: char| letter.is_ascii_digit(), "")) {
            continue;
        }
        let without: BTreeMap<_, _> = tensors.iter().filter(|(other, _)| *other != tensor).map(|(k, v)| (k.clone(), v.clone())).collect();
        let with = |added: &str, view: &TensorView<'_>| {
            let mut changed: BTreeMap<String, TensorView<'_>> = without.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            changed.insert(added.to_owned(), TensorView::new(view.dtype(), view.shape().to_vec(), view.data()).unwrap());
            open_with(folder.path(), &changed)
        };
        let dropped = open_with(folder.path(), &without);
        assert!(
            matches!(&dropped, Err(ModelError::MissingTensors { names }) if names.contains(tensor)),
            "{name}: without {tensor}: {:?}",
            dropped.err()
        );
        let renamed = format!("{tensor}_renamed");
        let error = with(&renamed, view).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(tensor.as_str()) || error.contains(&renamed), "{name}: {tensor} renamed: {error}");
        let mut shape = vec![1];
        shape.extend_from_slice(view.shape());
        let reshaped = with(tensor, &TensorView::new(view.dtype(), shape, view.data()).unwrap());
        assert!(
            matches!(&reshaped, Err(ModelError::TensorShape { name: named, .. }) if named == tensor),
            "{name}: {tensor} reshaped: {:?}",
            reshaped.err()
        );
    }
}

fn open_with(folder: &Path, tensors: &BTreeMap<String, TensorView<'_>>) -> Result<Model, ModelError> {
    safetensors::serialize_to_file(tensors.iter(), None, &folder.join("model.safetensors")).unwrap();
    Model::open(folder, LoadMode::Eager)
}

#[test]
fn of_every_row() {
    let folders = std::fs::read_dir(fixture("rows")).unwrap();
    let mut names: Vec<String> = folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() > 60, "{names:?}");
    names.iter().for_each(|name| check_damage(name));
}
