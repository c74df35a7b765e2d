//! What drivers expect to find in the environment.
//!
//! Mesa's Vulkan drivers ask a Wayland compositor which GPU it uses, and where `XDG_RUNTIME_DIR` is not set, as over
//! SSH and in containers, the Wayland library prints an error on stderr, once or several times, that says nothing about
//! this program. A folder that does not exist means the same, that there is no compositor, and is silent. The variable
//! has to be there before the driver is loaded. To set it in a process that runs is `unsafe`, because other threads may
//! read the environment, so the program starts itself anew with it: this costs about a millisecond, where the variable
//! is missing, and process, arguments and open files stay the same. Neither wgpu nor the Vulkan loader has an option
//! that silences the library alone; to turn off the layer that asks would also turn off the user's choice of a device
//! by `MESA_VK_DEVICE_SELECT`.
//!
//! Invariant: whether or not it can start itself anew, the program goes on.

/// A folder that there is not, by the convention for users without a home.
#[cfg(all(unix, not(target_vendor = "apple")))]
const NOWHERE: &str = "/nonexistent";

/// Starts the program anew with `XDG_RUNTIME_DIR`, if that is missing. Before anything is read or written.
#[cfg(all(unix, not(target_vendor = "apple")))]
pub(super) fn prepare_for_drivers() {
    use std::os::unix::process::CommandExt;

    // A relative path is as bad as none.
    if std::env::var_os("XDG_RUNTIME_DIR").is_some_and(|path| std::path::Path::new(&path).is_absolute()) {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut arguments = std::env::args_os();
    let mut again = std::process::Command::new(program);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    // Returns only if it fails, and then the complaints are the lesser evil.
    let _ = again.args(arguments).env("XDG_RUNTIME_DIR", NOWHERE).exec();
}

/// Drivers of other systems do not ask.
#[cfg(not(all(unix, not(target_vendor = "apple"))))]
pub(super) fn prepare_for_drivers() {}
