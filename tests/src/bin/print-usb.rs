//! Prints what `nusb` knows and reads of one USB device: `print-usb BUS DEVICE`, by the numbers that usbfs has.

use std::time::Duration;

use nusb::MaybeFuture;
use nusb::descriptors::language_id::US_ENGLISH;

fn main() {
    let numbers: Vec<u8> = std::env::args()
        .skip(1)
        .map(|word| word.parse().expect("usage: print-usb BUS DEVICE"))
        .collect();
    let [bus, address] = numbers[..] else {
        panic!("usage: print-usb BUS DEVICE")
    };
    let info = nusb::list_devices()
        .wait()
        .expect("sysfs can be read")
        .find(|device| (device.busnum(), device.device_address()) == (bus, address))
        .expect("the device is plugged in");
    println!("{info:#?}");
    let device = info.open().wait().expect("the device's node can be opened");
    let descriptor = device.device_descriptor();
    println!("{descriptor:#?}");
    println!("{:#?}", device.active_configuration());
    // Asked of the device itself, and not of sysfs.
    let index = descriptor
        .serial_number_string_index()
        .expect("it has a serial number");
    let serial = device.get_string_descriptor(index, US_ENGLISH, Duration::from_secs(1));
    println!("{}", serial.wait().expect("the device answers"));
}
